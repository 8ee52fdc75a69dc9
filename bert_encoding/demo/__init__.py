"""Bundled stories and simulated listeners whose truth is known.

Imports ``regression`` and the packages below it.
"""

from pathlib import Path

from bert_encoding.core.names import DEMOS
from bert_encoding.datasets import open_dataset
from bert_encoding.datasets.story import TRIMS, Dataset, Trim


def open_data(name: str, trim: Trim = TRIMS["published"], *, simulate: bool = True) -> Dataset:
    """Open a data set by the value of ``--data``: a demo, inspected and with the published trim, or a folder.

    Without ``simulate``, only the text of a demo can be used: its responses need the demo encoder.
    """
    if name not in DEMOS:
        return open_dataset(Path(name), trim)
    from bert_encoding.demo.stories import demo_stories, simulate_listener  # they load torch and transformers

    return simulate_listener(demo_stories(name))[0] if simulate else demo_stories(name)
