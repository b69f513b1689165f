"""The application: build a supernet, search an allocation, evaluate and export the pruned model.

The Python names that are meant to be used from outside, which stay where they are; all others may move:

- `search.inputs.models.from_pretrained` loads a model, `search.inputs.data` has the sources of text, and
- `search.inputs.data.prepare` makes token sequences of them.
- `local_prune.walk.build` fills a supernet with candidates,
- `supernet.store.Supernet`, whose units and levels are a
- `supernet.space.Space`.
- `search.budgets.budget.Budget` says what an allocation may cost,
- `search.evaluation.generation.GenerationEvaluator` measures allocations, and a strategy takes a
- `search.strategies.base.Problem` and finds one.
- `supernet.models.assemble.assemble` makes a model of an allocation, and
- `search.export.huggingface.HuggingFace` writes it.

Who adds something of their own implements one of these protocols and names the class as `_target_` in the configuration
(a stage is listed in `search.run.stages`):

- `local_prune.pruner.Pruner`, a method of local pruning
- `search.strategies.base.Strategy`, a search or a rule
- `search.evaluation.fitness.Fitness`, a loss
- `search.export.base.Exporter`, a format
- `search.trackers.base.Tracker`, a tool to watch runs with
- `search.run.stages.base.Stage`, a step of a run
"""
