"""The console scripts of an installation; each handles Ctrl-C before its slow imports."""

from importlib import import_module

from bert_encoding.core.interrupt import exit_on_interrupt


def commands() -> int:
    """``bert-encoding``: the commands of ``python -m bert_encoding``."""
    return _run("bert_encoding.__main__")


def study() -> int:
    """``bert-encoding-study``: the command of ``study/run.py``."""
    return _run("study.run")


def analysis() -> int:
    """``bert-encoding-analysis``: the command of ``study/analysis.py``."""
    return _run("study.analysis")


def _run(module: str) -> int:
    exit_on_interrupt()
    from bert_encoding.core.command_line import run_app

    return run_app(import_module(module).app)
