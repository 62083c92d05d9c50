"""transformers' DFlash beside our drafters: its loop and its network, which is trained here, for the library has no training.

Nothing here is needed to run fewstep. This file knows the trainer; it knows no claim.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewstep.core.objective import Batch, Loss
from fewstep.core.random import Rng
from fewstep.hub.save import save_hf
from fewstep.report.claims.claim import Bench
from fewstep.report.claims.tuning import dataset_of, tune
from fewstep.report.contest import RaceConfig, Record, compete
from fewstep.report.peers import Generate
from fewstep.training.objectives.stateless import Stateless

NAME = "dflash"
_BLOCK, _DEPTH, _ANCHORS, _FADE = 8, 2, 32, 4.0


def race_dflash(bench: Bench, ids: Sequence[Sequence[int]], config: RaceConfig) -> Record:
    """One round of DFlash over prompts `ids`, with the drafter among the bench's heads, else one that is trained there.

    Raises ValueError where transformers is missing or has no DFlash, and for a model that it cannot read or no data is known of.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel
        from transformers.utils import logging
    except ImportError:
        raise ValueError("peers: no transformers with DFlash is installed; pip install 'fewstep[peers]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, effort = bench.model, bench.effort
    save_hf(model, bench.scratch / f"{NAME}-target")
    target: Any = AutoModelForCausalLM.from_pretrained(bench.scratch / f"{NAME}-target", dtype=model.dtype, local_files_only=True)
    target.eval().requires_grad_(False)
    directory = (Path(effort.heads) if effort.heads else bench.scratch) / NAME
    if not directory.is_dir():
        bench.console.print(f"no drafter of transformers among the heads: training one for {effort.seconds:g} s", highlight=False)
        drafter = MuseGlimmerAssistantModel(MuseGlimmerAssistantConfig(**_fields(bench, target.config)))
        tune(bench, dataset_of(bench), drafter, Drafting(target), NAME)
        drafter.save_pretrained(directory)
    drafter = MuseGlimmerAssistantModel.from_pretrained(directory, dtype=model.dtype, local_files_only=True).eval()
    target.generation_config.eos_token_id = None  # every contestant emits the same number of tokens
    target.generation_config.pad_token_id = 0
    target.generation_config.speculation_type = "dflash"
    (record,) = compete([Generate(NAME, target, config, assistant=drafter)], ids, config.model_copy(update={"rounds": 1}))
    return record


@final
class Drafting(Stateless):
    """The surprise of the tokens after random anchors, from the target's hidden states before each and the anchor itself.

    Source: DFlash, arXiv 2602.06036, recalled: many anchors a row in one pass, early tokens weigh more.
    Differs: texts that share a row see one another.
    """

    name = NAME

    def __init__(self, target: Any) -> None:
        """`target`: a causal model of transformers, frozen."""
        self._target = target

    def loss(self, model: nn.Module, batch: Batch, rng: Rng) -> Loss:
        network: Any = model
        size, layers = network.config.block_size, network.config.target_layer_ids
        rows, length = batch.tokens.shape
        with torch.no_grad():
            seen = self._target(batch.tokens, output_hidden_states=True, use_cache=False).hidden_states
            context = torch.cat([seen[i + 1] for i in layers], -1)
        anchors = 1 + (rng.split("anchors").uniform(_ANCHORS) * (length - size)).long()
        place = anchors.unsqueeze(2) + torch.arange(size, device=anchors.device)  # [B,A,S]
        tokens = batch.tokens.gather(1, place.flatten(1)).view_as(place)
        noise = torch.full_like(tokens, network.config.mask_token_id)
        noise[:, :, 0] = tokens[:, :, 0]
        positions = torch.cat([torch.arange(length, device=place.device).expand(rows, -1), place.flatten(1)], 1)
        mask = _visible(anchors, length, size)
        hidden = network(
            noise_embeds=self._target.get_input_embeddings()(noise.flatten(1)),
            context_hidden_states=context,
            position_ids=positions,
            attention_mask={"full_attention": mask},
            use_cache=False,
        ).last_hidden_state.unflatten(1, (_ANCHORS, size))
        logits = self._target.get_output_embeddings()(hidden[:, :, 1:])
        found = cross_entropy(logits.flatten(0, 2).float(), tokens[:, :, 1:].flatten(), reduction="none").view(-1, size - 1)
        weight = torch.exp(-torch.arange(size - 1, device=found.device) / _FADE)
        value = (found * weight).sum() / (weight.sum() * len(found))
        return Loss(value, len(found), {"first": found[:, 0].mean().detach()})


def _visible(anchors: Tensor, length: int, size: int) -> Tensor:
    """[B,1,AS,L+AS]: the tokens of a block see what stands before its anchor, and one another."""
    block = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(size)
    before = torch.arange(length, device=anchors.device) < anchors[:, block].unsqueeze(2)
    own = (block.unsqueeze(1) == block).expand(len(anchors), -1, -1)
    return torch.cat([before, own], 2).unsqueeze(1)


def _fields(bench: Bench, target: Any) -> dict[str, Any]:
    """The config of a drafter whose layers are the target's own in shape, and read three of them."""
    depth = target.num_hidden_layers
    return {
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": _DEPTH,
        "num_attention_heads": target.num_attention_heads,
        "num_key_value_heads": target.num_key_value_heads,
        "head_dim": bench.model.network.width // target.num_attention_heads,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "layer_types": ["full_attention"] * _DEPTH,
        "block_size": _BLOCK,
        "mask_token_id": bench.model.eos_ids[0],  # masks are embedded by the target, which knows no mask
        "target_layer_ids": sorted({depth // 4, depth // 2, 3 * depth // 4}),
    }
