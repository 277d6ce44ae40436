"""What every part of a recipe is made of."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Settings shared by every part of a recipe: frozen, strict, unknown keys refused, field docstrings in the schema."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


# Marks of keys that do not affect a run's result ("setting": its seeds may differ in them), or that may change when a run resumes
# ("resume"). Shards count by content, which is compared when a run resumes.
FREE = {"free": ["setting", "resume"]}
FREE_IN_SETTING, FREE_AT_RESUME = {"free": ["setting"]}, {"free": ["resume"]}
