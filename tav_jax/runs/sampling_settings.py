"""The bounds of what decides a sample, for configs, batch plans and command lines alike."""

from typing import Annotated

from pydantic import Field, TypeAdapter

NumSteps = Annotated[int, Field(ge=1, le=999)]
GuidanceScale = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Eta = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what a JAX key can be made of

_CHECKS: dict[str, TypeAdapter] = {
    "num_inference_steps": TypeAdapter(NumSteps),
    "num_inv_steps": TypeAdapter(NumSteps),
    "guidance_scale": TypeAdapter(GuidanceScale),
    "eta": TypeAdapter(Eta),
    "seed": TypeAdapter(Seed),
}
_EXPECTED = {
    "num_inference_steps": "1 to 999",
    "num_inv_steps": "1 to 999",
    "guidance_scale": "0 or more, and finite",
    "eta": "0 to 1",
    "seed": "0 to 2^63 - 1",
}


def explain_if_wrong(name: str, value: int | float) -> str | None:
    """Return what was expected of a setting's value if it is out of bounds, else None."""
    try:
        _CHECKS[name].validate_python(value)
    except ValueError:
        return f"expected {_EXPECTED[name]}"
    return None
