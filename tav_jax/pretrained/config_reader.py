"""Read the attributes of a published JSON config. What is wrong is gathered and told at once."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tav_jax.errors import UserError
from tav_jax.text import brief, shorten

if TYPE_CHECKING:
    from tav_jax.pretrained.published_json import EncoderJson, PublishedJson

Published = Mapping[str, Any]
Json = TypeVar("Json", bound="PublishedJson")

MOST_PROBLEMS = 20  # that one message lists
MOST_KINDS = 3  # of unknown blocks that are named


class ConfigReader:
    """Reads attributes and gathers what is wrong, to say all of it at once.

    Args:
        published: The attributes.
        where: What messages call them.
    """

    def __init__(self, published: Published, where: str):
        self.published = published
        self.where = where
        self.prefix = ""
        self.seen: set[str] = set()
        self.problems: list[str] = []

    def problem(self, text: str) -> None:
        """Note that something is wrong."""
        self.problems.append(f"  {self.prefix}{text}")

    def section(self, name: str) -> "ConfigReader":
        """Return a reader of an object in this one, whose problems are this one's too."""
        published = self.published.get(name)
        if not isinstance(published, Mapping | None):
            self.problem(f"{name}: {brief(published)} is no object")
        reader = ConfigReader(published if isinstance(published, Mapping) else {}, self.where)
        reader.prefix, reader.problems = f"{self.prefix}{name}.", self.problems
        return reader

    def heads(self, json: "EncoderJson | None") -> None:
        """Note that an encoder's width does not divide over its heads; None has been noted."""
        if json is not None and json.hidden_size % json.num_attention_heads:
            self.problem(
                f"hidden_size: {json.hidden_size} is not divisible by "
                f"{json.num_attention_heads} num_attention_heads"
            )

    def parse(self, model: type[Json], published: Published) -> Json | None:
        """Return the attributes that are read, or None if some are wrong. Null means absent."""
        from pydantic import ValidationError

        from tav_jax.settings import explain

        self.seen |= set(model.model_fields)
        given = {name: published.get(name) for name in model.model_fields}
        try:
            return model.model_validate({k: v for k, v in given.items() if v is not None})
        except ValidationError as error:
            for name, text in explain(error, model):
                self.problem(f"{name}: {text}")
        return None

    def blocks(self, name: str, known: Mapping[str, bool]) -> tuple[bool, ...] | None:
        """Return whether each block of a list attends, by its class name without 2D or 3D.

        None if some are not supported.
        """
        published = self.published.get(name)
        names = published if isinstance(published, list | tuple) else []
        kinds = [str(kind).removesuffix("2D").removesuffix("3D") for kind in names]
        unknown = sorted(set(kinds) - set(known))
        for kind in unknown[:MOST_KINDS]:
            self.problem(f"{name}: {shorten(kind, 60)} is not supported, only {', '.join(known)}")
        return None if unknown else tuple(known[kind] for kind in kinds)

    def levels(self, name: str, values: Sequence[Any] | None, levels: int) -> None:
        """Note that there is not one value for each level; None has been noted already."""
        if values is not None and len(values) != levels:
            self.problem(f"{name}: expected {levels} levels, got {brief(list(values))}")

    def demand(self, demands: Mapping[str, tuple[Any, ...]]) -> None:
        """Note attributes that are not one of their values; the first one stands for absence."""
        for name, values in demands.items():
            self.seen.add(name)
            if self.published.get(name, values[0]) not in values:
                got = brief(self.published[name])
                self.problem(f"{name}: {got} is not supported, only {values[0]!r}")

    def finish(self, known: set[str]) -> None:
        """Raise if anything was wrong, or if an attribute that we do not know is switched on."""
        for name in sorted(set(self.published) - self.seen - known):
            if not name.startswith("_") and self.published[name] not in (None, False):
                got = brief(self.published[name])
                self.problem(f"{shorten(name, 60)}: not known to us, so {got} is refused")
        if len(self.problems) > MOST_PROBLEMS:
            more = len(self.problems) - MOST_PROBLEMS
            self.problems[MOST_PROBLEMS:] = [f"  and {more} more"]
        if self.problems:
            raise UserError(f"{self.where}: not supported:\n" + "\n".join(self.problems))
