"""The base class of every section of a job."""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    """A section is immutable. It refuses unknown keys, numbers that are not finite, and true for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python, and so pydantic, takes True for 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[info.field_name].annotation):
            raise ValueError(f"{str(value).lower()} is no value for it")
        return value


def _takes_bool(annotation: Any) -> bool:
    if annotation in (bool, Any) or isinstance(annotation, bool):
        return True
    return any(_takes_bool(part) for part in get_args(annotation))


Count = Annotated[int, Field(ge=1, le=2**48)]
"""No job counts more of anything, and what is computed of it stays within 64 bits."""

Width = Annotated[int, Field(ge=1, le=2**20)]
"""A count of things that are all made at once."""
