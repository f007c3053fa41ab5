"""Published figures of Tune-A-Video and of what it is compared with.

They were measured on other clips than yours, and reruns of the same benchmark differ by a point of
CLIP score. They say where the field is, not whether a run is better.
"""

from typing import NamedTuple


class PublishedRow(NamedTuple):
    """A figure that somebody has published.

    Args:
        system: What was measured.
        metric: The metric with its protocol.
        value: The figure.
        source: Where it is from.
    """

    system: str
    metric: str
    value: float
    source: str


_PAPER = "Wu et al., arXiv:2212.11565, first version"
_LOVEU = "leaderboard of LOVEU-TGVE-2023: 76 clips, 304 edits"
_V2VBENCH = "Sun et al., arXiv:2407.07111 (V2VBench): 50 clips, 150 edits"

PUBLISHED = (
    # 1,024 samples. The paper does not name its CLIP network.
    PublishedRow("CogVideo", "clip_text.paper", 23.66, _PAPER),
    PublishedRow("Tune-A-Video", "clip_text.paper", 26.57, _PAPER),
    PublishedRow("CogVideo", "preferred_for_quality.paper", 13.76, _PAPER),
    PublishedRow("Tune-A-Video", "preferred_for_quality.paper", 86.24, _PAPER),
    PublishedRow("CogVideo", "preferred_for_faithfulness.paper", 9.38, _PAPER),
    PublishedRow("Tune-A-Video", "preferred_for_faithfulness.paper", 90.62, _PAPER),
    *(
        PublishedRow(system, metric, value, _LOVEU)
        for system, *values in (
            ("Tune-A-Video", 92.40, 27.12, 20.36),
            ("VideoCrafter", 88.51, 25.55, 19.17),
            ("Noah Wukong", 91.25, 27.21, 20.72),
            ("T2I_HERO", 92.27, 25.57, 20.22),
            ("PAIR", 92.47, 25.53, 19.79),
            ("RewardT2VE", 92.17, 27.55, 20.55),
            ("CAMP", 89.90, 26.89, 20.71),
        )
        for metric, value in zip(
            ("clip_frames.loveu", "clip_text.loveu", "pick_score.loveu"), values, strict=True
        )
    ),
    *(
        PublishedRow(system, metric, value, _V2VBENCH)
        for system, *values in (
            ("Tune-A-Video", 0.934, 27.513),
            ("FateZero", 0.951, 25.065),
            ("Video-P2P", 0.943, 23.550),
            ("ControlVideo", 0.959, 28.551),
        )
        for metric, value in zip(
            ("clip_frames.v2vbench", "clip_text.v2vbench"), values, strict=True
        )
    ),
)


def published_rows(metrics: set[str]) -> list[PublishedRow]:
    """Return the paper's own figures, and those of others by these metrics."""
    return [row for row in PUBLISHED if row.source == _PAPER or row.metric in metrics]
