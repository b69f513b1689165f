"""Model families as data: what the modules of a decoder's blocks are called, and what its config calls their sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig, PreTrainedModel

from supernet.errors import InputError
from supernet.space import ATTENTION, MLP


@dataclass(frozen=True)
class Heads:
    """The attention heads of a dense model.

    Attributes:
        groups: KV heads; with their query heads they make KV groups.
        queries: Query heads of each KV head.
        dim: Channels of a head.
    """

    groups: int
    queries: int
    dim: int


def heads_of(config: PreTrainedConfig) -> Heads:
    """The heads that the config of a dense model describes."""
    heads = int(config.num_attention_heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    return Heads(groups, heads // groups, int(getattr(config, "head_dim", None) or config.hidden_size // heads))


@dataclass(frozen=True)
class Family:
    """What the modules of a family are called. Sub-blocks must be sequential and pre-norm, that is
    `x + post_norm(module(norm(x)))`, in the order attention, mixer, MLP.

    When a KV group goes, its rows of queries, keys and values go, and its columns of `attention_column`. When a neuron
    goes, its row of each of `mlp_rows` and its column of `mlp_column` go. A layer that is named again holds the next
    section of rows: ("qkv", "qkv", "qkv").

    Attributes:
        blocks: Path of the list of blocks in the model.
        final_norm: Path of the norm behind the last block.
        attention: Path of the attention in a block; empty where blocks have none.
        attention_rows: Layers of the attention that make queries, keys and values.
        attention_column: Layer that ends the attention.
        mlp: Path of the MLP in a block; empty where its layers lie in the block itself.
        mlp_rows: Layers of the MLP that make neurons; none where blocks have no MLP.
        mlp_column: Layer that ends the MLP.
        mlp_activation: Path of the activation function in a block, where the MLP's layers lie in the block itself.
        mixer: Path of a state-space mixer in a block; empty where blocks have none.
        mixer_stages: Linear layers of the mixer, in the order of computation.
        slices: Kinds of sub-blocks whose own code runs with fewer members; the others are measured with zeros instead.
        config_neurons: What the config calls the number of neurons.
        free_heads: Whether the config has a `head_dim`. Without it the family's own class takes the channels of a head
            for `hidden_size / heads`, so that it cannot hold fewer heads.
        heads: The attention heads, where they are not those that the config tells for all blocks.
    """

    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_post_norm: str | None = None
    attention_rows: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    attention_column: str = "o_proj"
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    mlp_rows: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_column: str = "down_proj"
    mlp_activation: str | None = None
    mixer: str = ""
    mixer_norm: str = "norm"
    mixer_stages: tuple[tuple[str, ...], ...] = ()
    slices: tuple[str, ...] = (ATTENTION, MLP)
    config_neurons: str = "intermediate_size"
    free_heads: bool = True
    heads: Heads | None = None

    def of_block(self, config: PreTrainedConfig, index: int) -> Family:
        """What the modules of one block are called: the same for all blocks, unless a subclass knows better.

        A family whose blocks differ (the first blocks of DeepSeek-V3 are dense, hybrids have attention in some blocks
        and mixers in others, layers may have heads of their own) is a subclass that gives each block's names with
        `dataclasses.replace`. What concerns the whole model (`blocks`, `final_norm`, `free_heads`) must stay the same.

        Args:
            config: The model's config.
            index: The block's number, from 0.
        """
        return self


GEMMA = Family(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
MAMBA = Family(blocks="backbone.layers", final_norm="backbone.norm_f", attention="", mlp_rows=(), mixer="mixer")

# Families by `config.model_type`. An entry is all that pruning of weights, of whole blocks and to fewer bits takes.
# Pruning of members and of single sub-blocks leaves layers of different sizes, for which the family also needs its two
# classes in `modeling_pruned` (`supernet.models.assemble.check_family`); a state-space mixer is a block of its own and
# needs none.
FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": Family(attention_rows=("qkv_proj",) * 3, mlp_rows=("gate_up_proj",) * 2, slices=(MLP,)),
    "opt": Family(
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        attention_norm="self_attn_layer_norm",
        attention_column="out_proj",
        mlp="",
        mlp_norm="final_layer_norm",
        mlp_rows=("fc1",),
        mlp_column="fc2",
        mlp_activation="activation_fn",
        slices=(MLP,),
        config_neurons="ffn_dim",
        free_heads=False,
    ),
    "gpt2": Family(
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention="attn",
        attention_norm="ln_1",
        attention_rows=("c_attn",) * 3,
        attention_column="c_proj",
        mlp_norm="ln_2",
        mlp_rows=("c_fc",),
        mlp_column="c_proj",
        slices=(),
        config_neurons="n_inner",
        free_heads=False,
    ),
    "mamba": replace(MAMBA, mixer_stages=(("in_proj",), ("x_proj",), ("out_proj",))),
    "mamba2": replace(MAMBA, mixer_stages=(("in_proj",), ("out_proj",))),
}

# Switches of a config, the one setting that the entries above describe, and what it means.
VARIANTS = {
    "do_layer_norm_before": (True, "blocks must be pre-norm"),
    "add_cross_attention": (False, "blocks must be without cross-attention"),
    "_remove_final_layer_norm": (False, "there must be a norm behind the last block"),
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model; InputError for one that is not known, which says how to add it."""
    return family_of_config(model.config)


def family_of_config(config: PreTrainedConfig) -> Family:
    """The family of the models that a config describes; InputError for one that is not known, or a variant of one.

    Nothing else of a config can be relied on before.
    """
    model_type = str(config.model_type)
    check_known(model_type)
    if getattr(config, "is_heterogeneous", False):
        raise InputError(
            "the model's layers differ in size already (per_layer_config); prune the dense model it was made from"
        )
    for key, (known, why) in VARIANTS.items():
        if getattr(config, key, known) != known:
            raise InputError(f"this variant of '{model_type}' is not known: {why} (its config has {key}={not known})")
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        raise InputError(
            f"this variant of '{model_type}' is not known: embeddings must be as wide as the hidden states"
        )
    return FAMILIES[model_type]


def check_known(model_type: str) -> None:
    """Raise InputError for a `model_type` that is not known, and say how to add it."""
    if model_type not in FAMILIES:
        raise InputError(
            f"the model's architecture '{model_type}' is not known; known are {', '.join(FAMILIES)}; a family with the "
            "same structure needs one entry in supernet/models/families.py, and to lose heads, neurons or sub-blocks "
            "two classes in supernet/models/modeling_pruned.py"
        )
