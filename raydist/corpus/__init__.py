"""Raw files to token logs: each source once, the same bytes wherever and however often it is made.

    files ──> slices ──> formats ──> clean ──> tokenizer ──> log: shards, a commit record for each slice
    one list  planned,   records,    steps     ids           │
              hashed     or why not                          └─▶ manifest, when all slices are there
    └──── source ────┘  └────────── pipeline, on Ray Data ──────────┘

    files         which files a source names, with their identities
    source        a source's files, and how they are read, cleaned and sliced
    slices        the units of work, in their planned order
    formats       readers of text, JSON, CSV, Parquet and Arrow; extensions: what a name says of a file
    clean         cleaning steps, named ones and the user's own
    tokenizer     text to ids, and tokenizers that are trained here
    pipeline      reads, cleans, tokenizes and writes a slice as one Ray task
    build         plans a token log, makes its missing slices, estimates it
    log           shards as Arrow files: written, and read as views
    log_folder    every name in a token log's folder, and how each file is written and read

Only build and pipeline need Ray.
"""
