"""Which parameters train: labels by name, and the optimiser that uses them."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Literal

import optax

from tav_jax.errors import UserError
from tav_jax.models.network import in_modules
from tav_jax.types import Params

Label = Literal["train", "freeze"]
LRScheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
]

TRAINABLE_MODULES = ("attn1.to_q", "attn2.to_q", "attn_temp")
"""What Tune-A-Video trains: the queries of both attentions and all of the temporal attention."""


def label_params(names: Iterable[str], trainable_modules: Sequence[str]) -> dict[str, Label]:
    """Return "train" or "freeze" for every parameter name.

    A pattern is the end of a module's path, in whole names, as in the original's
    `trainable_modules`: "attn1.to_q" matches every `...attn1.to_q.kernel`, and "attn_temp" matches
    every parameter in such a module.

    Raises:
        UserError: Some patterns match nothing; all of them are listed, with similar names.
    """
    names = list(names)
    unmatched = [
        module
        for module in trainable_modules
        if not any(in_modules(name, [module]) for name in names)
    ]
    if not trainable_modules:
        raise UserError("trainable_modules: empty, so nothing would train; name some modules")
    if unmatched:
        raise UserError("\n".join(_no_match(module, names) for module in unmatched))
    return {name: "train" if in_modules(name, trainable_modules) else "freeze" for name in names}


def _no_match(pattern: str, names: list[str]) -> str:
    """Return a message with the modules whose names are most like the pattern."""
    paths = [name.split(".")[:-1] for name in names]
    modules = {".".join(path[-depth:]) for path in paths for depth in (1, 2)}
    modules = {module for module in modules if not module.split(".")[0].isdigit()}
    tail = pattern.split(".")[-1]
    same_end = sorted(m for m in modules if m.endswith(f".{tail}"))
    near = same_end or difflib.get_close_matches(pattern, sorted(modules), n=5, cutoff=0.4)
    hint = f"modules like it: {', '.join(near)}" if near else "see model.unet.params for all names"
    return f"trainable_modules: '{pattern}' matches no parameter; {hint}"


def select(params: Params, labels: dict[str, Label], label: Label) -> Params:
    """Return the parameters that carry a label."""
    return {name: value for name, value in params.items() if labels[name] == label}


def make_optimizer(
    labels: dict[str, Label],
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_beta1: float = 0.9,
    adam_beta2: float = 0.999,
    adam_epsilon: float = 1e-8,
    adam_weight_decay: float = 1e-2,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """Return AdamW for the parameters labelled "train"; the others do not change.

    Loshchilov & Hutter 2019 (arXiv:1711.05101). Gradients are clipped within the trained branch.
    The norm is then over the trained parameters, as in the original, and no gradient of a frozen
    parameter is used, so the compiler computes none.
    """
    adamw = optax.adamw(
        learning_rate,
        b1=adam_beta1,
        b2=adam_beta2,
        eps=adam_epsilon,
        weight_decay=adam_weight_decay,
    )
    train = optax.chain(optax.clip_by_global_norm(max_grad_norm), adamw)
    return optax.partition({"train": train, "freeze": optax.set_to_zero()}, labels)


def make_lr_schedule(
    name: LRScheduler, learning_rate: float, *, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Return the learning rate of each update, counted from 0.

    The names and their meanings are those of diffusers' `get_scheduler`. "constant" ignores
    `warmup_steps`. The others rise from 0 during `warmup_steps`. Then "constant_with_warmup" stays,
    and the rest fall until `total_steps`: to 1e-7 if "polynomial", and else to 0.
    """
    rest = max(1, total_steps - warmup_steps)
    after = {
        "constant_with_warmup": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(learning_rate, rest),
        "cosine_with_restarts": optax.cosine_decay_schedule(learning_rate, rest),
        "polynomial": optax.polynomial_schedule(learning_rate, min(1e-7, learning_rate), 1, rest),
    }
    if name == "constant":
        return optax.constant_schedule(learning_rate)
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, after[name]], [warmup_steps])
