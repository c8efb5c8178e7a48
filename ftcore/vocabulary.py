"""New tokens: into the tokenizer, and as rows of the embedding and of the head that start at the mean of the others.

With such a start the model's other logits hardly change, since no new token is likelier than the average one (Hewitt
2021, "Initializing New Word Embeddings for Pretrained Language Models").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ftcore import checkpoint
from ftcore.errors import Problem, Refused
from ftcore.specs import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEY = "model.new_tokens"


def problems(tokens: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with the tokens themselves."""
    for token in tokens:
        if not token.strip() or token != token.strip():
            yield Problem(KEY, f"{token!r} is empty or has white space around it", "give the bare word")
        elif tokens.count(token) > 1:
            yield Problem(KEY, f"{token!r} is there {tokens.count(token)} times", "name each token once")
            return


def add(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Add tokens to a tokenizer and return those that it did not have.

    They are no special tokens: they are trained, shown and written like any word.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in tokens if token not in known]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return new


def grow(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> None:
    """Make room for the tokens in the model's embedding and head, and set their rows to the mean of the others.

    :param tokenizer: the checkpoint's own, without the new tokens; it gets them.
    """
    import torch

    known = len(tokenizer)
    new = add(tokenizer, tokens)
    if not new:
        return
    rows = {table.shape[0] for table in _tables(model)}
    if len(tokenizer) > min(rows) and len(rows) > 1:
        message = f"the embedding and the head have {max(rows)} and {min(rows)} rows, so that they do not grow together"
        raise Refused(Problem(KEY, message, "leave it out"))
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        # Some checkpoints have spare rows; the others get just as many as are needed.
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(new)
    with torch.no_grad():
        for weight in _tables(model):
            weight[ids] = weight[:known].float().mean(dim=0).to(weight.dtype)


def grown(plan: Plan, model: PreTrainedModel) -> None:
    """Make room for the plan's new tokens in a model that was just loaded."""
    assert plan.run.model is not None
    if plan.run.model.new_tokens:
        grow(model, own_tokenizer(plan), plan.run.model.new_tokens)


def _tables(model: PreTrainedModel) -> list[Any]:
    """The embedding, and the weight and bias of the head where it is not the embedding again."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = [] if head is None or head.weight is embedding.weight else [head.weight]
    bias = getattr(head, "bias", None)
    return [embedding.weight, *own, *([] if bias is None else [bias])]


def own_tokenizer(plan: Plan) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer as it stands."""
    from transformers import AutoTokenizer

    assert plan.run.model is not None
    place = checkpoint.locate(plan.run.model, plan.family)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        place, revision=plan.run.model.revision, trust_remote_code=False
    )
    return tokenizer


def trained_rows(plan: Plan, model: PreTrainedModel, whole: Sequence[str] = ()) -> dict[str, list[int]]:
    """Name of the embedding, and of an untied head, to the ids whose rows an adapter trains: those of the new tokens.

    :param whole: last names of modules that are trained whole anyway.
    """
    assert plan.run.model is not None
    if not plan.run.model.new_tokens:
        return {}
    tokenizer = own_tokenizer(plan)
    add(tokenizer, plan.run.model.new_tokens)
    ids = tokenizer.convert_tokens_to_ids(list(plan.run.model.new_tokens))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    both = {names[id(module)].rpartition(".")[2] for module in (embedding, head) if module is not None}
    if tied and len(both & set(whole)) == 1 < len(both):
        message = f"{' and '.join(sorted(both))} are one table of this model, and with new tokens both are trained"
        fix = f"write adapter.modules_to_save=[{','.join(sorted(both))}], or leave it out: new rows are trained anyway"
        raise Refused(Problem("adapter.modules_to_save", message, fix))
    modules = [names[id(module)] for module in (embedding, *([] if tied else [head]))]
    return {name: sorted(ids) for name in modules if name.rpartition(".")[2] not in whole}
