"""The commands around a study, such as ``python -m bert_encoding check`` to check data."""

if __name__ == "__main__":  # the imports take seconds
    from bert_encoding.core.interrupt import exit_on_interrupt

    exit_on_interrupt()

import sys

import cyclopts
from cyclopts import Parameter

from bert_encoding.core.command_line import called_as, run_app

COMMANDS = {  # name -> (function, help); each is imported only when it is called
    "check": ("check:check", "Check a data set: usable, usable with masks or with doubts, or not usable, and why."),
    "fetch": ("fetch:fetch", "Download what a study needs from a public data set; the same command resumes."),
    "export": (
        "export:export",
        "Write word vectors to a file; BERT's are contextual: a word has another vector in every sentence.",
    ),
    "partition": ("partition:partition", "Variance partitioning: what BERT explains beyond other features."),
    "predict": ("predict:predict", "Predict the class of texts, or the responses to a story."),
    "fit": ("fit:fit", "Refit ridge with a study's best encoder, and save the weights."),
    "map": ("map:map_voxels", "Draw a trial's CC as a NIfTI volume or a flat cortex."),
}

app = cyclopts.App(
    name=called_as("bert-encoding", "python -m bert_encoding"),
    help=__doc__,
    version_flags=[],
    default_parameter=Parameter(negative=""),
)
for name, (function, text) in COMMANDS.items():
    app.command(f"bert_encoding.commands.{function}", name=name, help=text)


if __name__ == "__main__":
    sys.exit(run_app(app))
