"""The base class of every section of a job."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section is immutable and refuses unknown keys, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1, le=2**48)]
"""No job counts more of anything, and what is computed of it stays within 64 bits."""

Width = Annotated[int, Field(ge=1, le=2**20)]
"""A count of things that are all made at once."""
