"""Loading models: from the hub or a folder, from Python packages that carry one, or made at random for tests.

The configuration names one of `from_pretrained`, `from_wheel` and `random_llama` as `_target_`; each gives a
`LoadedModel`.
"""

from search.inputs.models.loaded import LoadedModel as LoadedModel
from search.inputs.models.loaded import dtype_of as dtype_of
from search.inputs.models.loaded import fingerprint as fingerprint
from search.inputs.models.packages import from_wheel as from_wheel
from search.inputs.models.pretrained import from_pretrained as from_pretrained
from search.inputs.models.synthetic import random_llama as random_llama
