"""The command line: `python -m search +experiment=demo`. Exit status 0, or 1 with one line that says what was wrong."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from search.arguments import accept_any_model, check_choices
from search.config import conf_dir
from search.errors import one_line
from supernet.errors import InputError


def main() -> None:
    """Run the command line in `sys.argv`."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed over many lines
    with _user_errors():
        sys.argv[1:] = accept_any_model(sys.argv[1:], conf_dir())
        check_choices(sys.argv[1:], conf_dir())
        _run()


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="search")
def _run(config: DictConfig) -> None:
    with _user_errors():  # here too: Hydra adds a line of its own to exceptions that leave the job
        import transformers

        from search.pipeline import run  # takes seconds (torch, transformers); a wrong option should not wait for it

        transformers.utils.logging.disable_progress_bar()
        # transformers logs a warning for each attribute that layers of a pruned model may differ in; ours are meant to.
        logging.getLogger("transformers.integrations.heterogeneity").setLevel(logging.ERROR)
        logging.getLogger("huggingface_hub").propagate = False  # it prints its retries by a handler of its own
        run(config, Path(HydraConfig.get().runtime.output_dir))


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except (InputError, HydraException, OmegaConfBaseException, OSError, YAMLError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        from supernet.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        advice = "lower evaluator.memory or evaluator.cache, use evaluator.resident=blocks, or lower prune.batch"
        print(f"error: {one_line(error) or 'out of memory'}; {advice}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last completed step", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
