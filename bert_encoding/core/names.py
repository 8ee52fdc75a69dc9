"""Names shared by many files: bundled data, phases, methods, tasks, result files, and the metric of each task."""

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
    """The score that a study optimises: its column, its label, and whether higher is better."""

    column: str
    label: str
    is_gain: bool

    def better(self, value: float, reference: float) -> bool:
        """Whether a value is better than a reference."""
        return value > reference if self.is_gain else value < reference


METRICS = {  # by task
    ENCODING: Metric("cc_mean", "CC", True),
    CLASSIFICATION: Metric("accuracy", "accuracy", True),
    ADAPT: Metric("mlm_loss_heldout", "held-out loss", False),
}
