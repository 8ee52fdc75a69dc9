"""Names that many files share: bundled data, phases, methods, tasks, result files, and the metric of each task."""

from typing import NamedTuple

DEMO, DEMO_NULL, DEMO_HELPS = "demo", "demo-null", "demo-helps"  # values of ``--data``
DEMOS = (DEMO, DEMO_NULL, DEMO_HELPS)
COMPLETE, STOPPED, FAILED = "COMPLETE", "STOPPED", "FAILED"
WORD_RATE, BAG_OF_WORDS, STATIC = "word_rate", "bag_of_words", "static"
FROZEN, RANDOM, LORA, FULL, PARTIAL = "frozen", "random", "lora", "full", "partial"
TUNED = (LORA, FULL, PARTIAL)  # methods that train BERT
BERT_METHODS = (FROZEN, RANDOM, *TUNED)
BASELINE, SEARCH, CONFIRM = "baseline", "search", "confirm"
STUDY_FILE, RECORD_FILE, DETAILS_FILE = "study.json", "record.json", "details.npz"
ROI_PREFIX = "cc_roi_"  # mean CC of a region of interest
ENCODING, CLASSIFICATION, ADAPT = "encoding", "classification", "adapt"


class Metric(NamedTuple):
    """What a study searches for: a score's name and label, and whether more of it is better."""

    column: str
    label: str
    is_gain: bool

    def better(self, one: float, other: float) -> bool:
        """Whether one value is better than another."""
        return one > other if self.is_gain else one < other


METRICS = {  # by task
    ENCODING: Metric("cc_mean", "CC", True),
    CLASSIFICATION: Metric("accuracy", "accuracy", True),
    ADAPT: Metric("mlm_loss_heldout", "held-out loss", False),
}
