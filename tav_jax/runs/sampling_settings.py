"""The settings of sampling, defined and bounded once.

Configs, experiments, batch plans, command lines and the records of samples all use this value.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic.dataclasses import dataclass

from tav_jax.diffusion.samplers import SamplerName, check_eta
from tav_jax.pretrained.prompts import PromptSyntax
from tav_jax.settings import STRICT, GuidanceScale, NumSteps, Share, Text, parse


@dataclass(frozen=True, config=STRICT)
class SamplingSettings:
    """How prompts become videos. The defaults are the original release's.

    Args:
        negative_prompt: What the videos are not to show.
        num_inference_steps: Number of sampling steps.
        sampler: "ddim", or "dpm_solver" for DPM-Solver++(2M), which needs some 20 steps where DDIM
            needs 50.
        guidance_scale: Weight of the guidance. At 1 or below there is none.
        eta: Share of noise in each DDIM step, from 0 to 1.
        num_inv_steps: Number of inversion steps, or None to start from random noise.
        prompt_syntax: How prompts are written: "plain", or "weighted" with weights as in
            `(word:1.3)` and of any length.

    Raises:
        UserError: `eta` is not 0 and the sampler has no such noise.
    """

    negative_prompt: Text = ""
    num_inference_steps: NumSteps = 50
    sampler: SamplerName = "ddim"
    guidance_scale: GuidanceScale = 12.5
    eta: Share = 0.0
    num_inv_steps: NumSteps | None = 50
    prompt_syntax: PromptSyntax | None = "plain"

    def __post_init__(self) -> None:
        check_eta(self.sampler, self.eta)

    def with_changes(self, changes: Mapping[str, Any], where: str) -> "SamplingSettings":
        """Return these settings with some of them changed.

        Args:
            changes: New values by name.
            where: Where they are from, for messages.

        Raises:
            UserError: The new values do not go with the others.
        """
        return parse(SamplingSettings, {**asdict(self), **changes}, where)


SETTING_NAMES = tuple(field.name for field in fields(SamplingSettings))


def select_settings(settings: SamplingSettings, *, invert: bool) -> SamplingSettings:
    """Return the settings alone of a value that has further fields.

    Args:
        settings: A value of a subclass.
        invert: Keep the number of inversion steps. Otherwise start from random noise.
    """
    values = {name: getattr(settings, name) for name in SETTING_NAMES}
    return SamplingSettings(**values if invert else values | {"num_inv_steps": None})
