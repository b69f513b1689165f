"""What `python -m search` does between the shell and the pipeline: arguments, Hydra, and one line for whatever goes
wrong.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from search.cli.arguments import check_choices, prepared
from search.cli.declared import check_declared
from search.errors import explained, reason
from search.paths import conf_dir


def command() -> None:
    """Run the command line in `sys.argv`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed over many lines
    with _user_errors():
        sys.argv[1:] = prepared(sys.argv[1:], conf_dir())
        check_choices(sys.argv[1:], conf_dir())
        _run()
        sys.stdout.flush()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="search")
def _run(config: DictConfig) -> None:
    with _user_errors():  # here too: Hydra adds a line of its own to exceptions that leave the job
        for handler in logging.getLogger().handlers:
            handler.handleError = _raise  # type: ignore[method-assign]
        chosen = HydraConfig.get()
        check_declared(config, chosen)

        import transformers

        # takes seconds (torch, transformers); a wrong option should not wait for it
        from search.run.pipeline import run

        transformers.utils.logging.disable_progress_bar()
        # transformers logs a warning for each attribute that layers of a pruned model may differ in; ours are meant to.
        logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)
        logging.getLogger("huggingface_hub").propagate = False  # it prints its retries by a handler of its own
        typed = frozenset(override.partition("=")[0].lstrip("+") for override in chosen.overrides.task)
        if not {"data", "experiment"} & typed:
            another = "data=local data.source.path=FILE_OR_FOLDER takes your own, and conf/data has others"
            logging.getLogger(__name__).info(
                "text: data=%s, as none was chosen; %s", chosen.runtime.choices["data"], another
            )
        run(config, Path(chosen.runtime.output_dir), typed)


def _raise(record: logging.LogRecord) -> NoReturn:
    """Raise the error at hand, where logging would print a traceback because a stream cannot be written."""
    raise  # noqa: PLE0704


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # `... | head -1`: whoever listened has heard enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it at its end
        sys.exit(141)
    except Exception as error:
        line = explained(error)
        if line is None:
            line = (
                f"{type(error).__name__}: {reason(error)}; this is a fault of this program, please report it with "
                f"{_kept(error)}"
            )
        print(f"error: {line}", file=sys.stderr)
        sys.exit(1)


def _kept(error: Exception) -> str:
    """Write the traceback to a file and return its name; the traceback itself where no file can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="sparsity-search-", suffix=".log", delete=False) as file:
            file.write(text)
        return file.name
    except OSError:
        return text
