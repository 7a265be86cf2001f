"""What a Hugging Face model is here."""
