"""A setting that no file declares is refused, wherever it comes from, and one that is needed cannot be taken away."""

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from search.cli.declared import check_declared
from search.paths import conf_dir, folder_name
from supernet.errors import InputError


@pytest.fixture(autouse=True)
def at_work() -> Iterator[None]:
    """Hydra, as it is while a job runs."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def check(*overrides: str) -> None:
    config = compose("search", list(overrides), return_hydra_config=True)
    hydra = OmegaConf.masked_copy(config, ["hydra"]).hydra
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    check_declared(config, hydra)


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("+prune.multpile=4", "prune.multiple"),
        ("++budget.sparsty=0.5", "budget.sparsity"),
        ("++supernet.level=5", "supernet.levels"),
        ("++data.sequence_lenght=5", "data.sequence_length"),
        ("++data.sequences.calibraton=5", "data.sequences.calibration"),
        ("++data.source.pth=x", "data.source"),
        ("++evaluate.bach=5", "evaluate.batch"),
        ("++evaluator.residnet=blocks", "evaluator.resident"),
        ("+strategy.elite=2", "strategy."),
        ("+prune.pruner.damp=2", "prune.pruner.damping"),
        ("+fitness.k=2", "fitness."),
        ("+export.dtyp=2", "export.dtype"),
        ("+sed=1", "seed"),
    ],
)
def test_a_setting_that_nothing_declares_is_refused(override: str, near: str) -> None:
    for more in ([], ["+experiment=smoke"]):
        with pytest.raises(InputError) as refusal:
            check(*more, override)
        assert f"there is no setting {override.partition('=')[0].strip('+')}; did you mean" in str(refusal.value)
        assert near in str(refusal.value)


@pytest.mark.parametrize("override", ["++budget.sparsity=0.5", "++prune.multiple=8", "++strategy.offspring=3"])
def test_one_that_is_there_may_be_set_with_pluses(override: str) -> None:
    check(override)


@pytest.mark.parametrize(
    ("override", "needed"),
    [("~prune.multiple", "prune.multiple"), ("~evaluate", "evaluate"), ("~data.source.splits", "data.")],
)
def test_what_is_needed_cannot_be_taken_away(override: str, needed: str) -> None:
    choice = ["data=wikitext2"] if "splits" in override else []
    with pytest.raises(InputError, match=f"{needed}.* was taken away, but is needed; leave out ~"):
        check(*choice, override)


@pytest.mark.parametrize(
    ("override", "choice"),
    [
        ("prune.pruner=null", "prune=NAME"),
        ("data.source=null", "data=NAME"),
        ("data.source=5", "data=NAME"),
    ],
)
def test_a_component_must_be_one(override: str, choice: str) -> None:
    with pytest.raises(InputError, match=f"names no component; choose one with {choice}"):
        check(override)


def test_an_experiment_may_set_what_its_own_choices_have() -> None:
    """prune.multiple, say, which the method that is chosen instead has not."""
    check("+experiment=smoke", "prune=wanda")
    with pytest.raises(InputError, match="prune.multiple is only for structured methods"):
        check("+experiment=smoke", "prune=wanda", "++prune.multiple=8")


# Names of folders


def test_plain_overrides_are_the_name() -> None:
    assert folder_name("budget.sparsity=0.5,seed=1") == "budget.sparsity=0.5,seed=1"
    assert folder_name("") == "adhoc"


def test_other_overrides_have_another_name() -> None:
    odd = [
        "a=x/y",
        "a=x_y",
        "a='x/y'",
        'a="x"',
        "a=x",
        "a=" + "0.1," * 100,
        "a=" + "0.1," * 99,
        "a=..",
        "a=新",
        "a=" + "新" * 99,
        "..",
    ]
    names = [folder_name(one) for one in odd]
    assert len(set(names)) == len(odd) - 1  # quotes alone make no difference
    assert folder_name('a="x"') == folder_name("a=x")
    assert all("/" not in name and name not in ("", ".", "..") and len(name.encode()) <= 100 for name in names)
