"""Every model is measured on every text as on that text alone, and the table shows all of them."""

from collections.abc import Callable, Iterable, Sequence

import pytest
from torch import Tensor
from transformers import PreTrainedModel

from search.evaluate.held_out import HeldOut, difference
from search.evaluate.texts import further_json, measure_all
from search.evaluation.resources import Resources
from search.evaluation.teacher import TeacherTargets
from search.inputs.data import TokenSet
from search.report.table import metrics_table


def track(items: Sequence[Tensor], title: str) -> Iterable[Tensor]:
    return items


def test_every_text_is_measured_as_it_is_alone(model_of: Callable[..., PreTrainedModel], ids: Tensor) -> None:
    dense, made = model_of("llama"), []
    texts = {"": TokenSet(ids, 1, "one"), "speeches": TokenSet(ids.flip(1), 1, "other", leading=2)}

    def pruned(factor: float) -> PreTrainedModel:
        model = model_of("llama")
        model.model.layers[1].mlp.down_proj.weight.mul_(factor)
        made.append(factor)
        return model

    models = {"uniform": lambda: pruned(0.5), "searched": lambda: pruned(0.9)}
    stores, seen, resources = list[TeacherTargets](), list[str](), Resources(memory=1000)

    def room(count: int) -> TeacherTargets:
        stores.append(resources.teacher_targets(count))
        return stores[-1]

    found = measure_all(dense, texts, models, 2, track, room, lambda title, model: seen.append(title))
    assert made == [0.5, 0.9]  # once each
    assert seen == ["dense", "uniform", "searched"]
    assert [store.limit for store in stores] == [500, 500]  # together no more than there is
    for name, text in texts.items():
        alone = HeldOut(dense, text.ids, 2, track, text.unscored)
        expected = {"dense": alone.dense} | {title: alone.measure(make(), title) for title, make in models.items()}
        for title, metrics in expected.items():
            assert found[name][title].to_json() == pytest.approx(metrics.to_json(), abs=1e-6)
    further = further_json(found, {"speeches": texts["speeches"]})
    assert set(further) == {"speeches"} and further["speeches"]["tokens"] == ids.numel()
    assert further["speeches"]["searched"]["kl_divergence"] == found["speeches"]["searched"].kl_divergence
    gap = difference(found["speeches"]["searched"], found["speeches"]["uniform"])
    assert further["speeches"]["searched_minus_uniform"] == gap

    own = {name: metrics.to_json() | {"kept": 1.0} for name, metrics in found[""].items()}
    own |= {"searched_minus_uniform": difference(found[""]["searched"], found[""]["uniform"]), "texts": further}
    lines = metrics_table(own).splitlines()
    at = lines.index("on 60 tokens of another text, speeches:")
    assert len(lines) == at + 5
    assert f"{further['speeches']['uniform']['perplexity']:.2f}" in lines[at + 2]
    assert lines[at + 3].startswith("searched ") and len(lines[at + 3]) == len(lines[3])
    assert f"{gap['kl_divergence']:+.4f}" in lines[at + 4]
