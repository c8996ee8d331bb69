"""Whether an engine fits on the cards that its replicas may get: asked before anything starts."""

from collections.abc import Sequence

from phi4ray.config import EngineConfig
from phi4ray.errors import ConfigError
from phi4ray.gpus import find_gpu, gpus_labelled
from phi4ray.memory import cannot_fit, place_engine, why_not


def cards(said: str | None, cluster: Sequence[str], recipe: str | None) -> tuple[str, ...]:
    """The cards to plan for: what was said, else what the cluster has, else the recipe's.

    Of several that a label of the cluster stands for, the recipe's if it is one of them, else all.
    Where the catalogue lacks all labels, the recipe's card comes beside them: it can be planned,
    and they keep an engine from being refused for a card that may not be there.

    Raises:
        ConfigError: what was said is not in the catalogue.
    """
    if said is not None:
        find_gpu(said)
        return (said,)
    planned = [card for label in cluster for card in _meant(label, recipe)]
    if recipe is not None and not any(gpus_labelled(label) for label in cluster):
        planned.append(recipe)
    return tuple(planned)


def _meant(label: str, recipe: str | None) -> tuple[str, ...]:
    several = gpus_labelled(label)
    if len(several) < 2:
        return (label,)
    return (recipe,) if recipe in several else several


def needs_no_plan(engine: EngineConfig) -> str | None:
    """Why this engine takes no GPU's memory; None if it does."""
    if engine.kind == "fake":
        return "the fake engine needs none"
    return None if engine.gpus_per_replica else "its replicas take no GPU"


def refuse_misfit(engine: EngineConfig, cards: Sequence[str]) -> None:
    """Refuse an engine that certainly fits on none of these cards.

    What cannot be planned, and what only estimates rule out, may start: the engine itself will say.

    Raises:
        ConfigError: why, and what would fit.
    """
    reasons = {card: misfit(engine, card) for card in cards}
    if reasons and all(reasons.values()):
        whole = "; ".join(f"on {find_gpu(card).title}: {why}" for card, why in reasons.items())
        raise ConfigError(f"{engine.model} cannot start {whole} (--gpu names another card)")


def misfit(engine: EngineConfig, card: str) -> str | None:
    """Why an engine certainly cannot start on a card, and what would; None where it may."""
    if needs_no_plan(engine) is not None:
        return None
    try:
        placement = place_engine(engine, card)
    except ConfigError:
        return None
    try:
        return why_not(placement) if cannot_fit(placement) else None
    except ConfigError as error:
        return str(error)
