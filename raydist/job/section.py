"""The base class of every section of a job."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section is immutable and refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
