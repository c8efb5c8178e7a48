"""A run, as one straight line of hook calls."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftcore import hooks as h
from ftcore import memory, splits
from ftcore.answers import stop_at_turn_ends
from ftcore.catalog import installed
from ftcore.config import RewardConfig, RunConfig
from ftcore.defaults.plan import PlanMaker
from ftcore.device import Device
from ftcore.errors import Problem, Refused, refuse
from ftcore.exporting import Exports, exports
from ftcore.manager import Hooks
from ftcore.report import note
from ftcore.rewards import Guarded, counted, guarded
from ftcore.specs import Answer, Artifact, Loaded, PatchReport, Phase, Plan, RunResult
from ftcore.trained_model import Checkpoint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def prepare(config: RunConfig, plugins: Sequence[object] = ()) -> tuple[Hooks, Plan]:
    """The hooks and the plan of a run; no weight is read.

    Raises Refused with all problems at once.
    """
    catalog = installed()
    hooks = _hooks(config, plugins)
    if reward := _sample_reward(config, hooks):
        chosen = catalog.find("reward", reward).config_class()(name=reward)
        assert isinstance(chosen, RewardConfig)
        config = replace(config, reward={reward: chosen})
        hooks = _hooks(config, plugins)
    plan = hooks.first(h.ftcore_make_plan, config=config, device=Device())
    refuse([*hooks.collect(h.ftcore_check_plan, plan=plan), *_no_reward(plan, hooks)])
    return hooks, _with_rows(hooks, plan)


def _with_rows(hooks: Hooks, plan: Plan) -> Plan:
    if plan.run.trainer is None or plan.run.trainer.micro_batch >= 0:
        return plan
    from ftcore.batch import decided

    return decided(hooks, plan)


def load(hooks: Hooks, plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None) -> Loaded:
    """From a plan to a quantized, patched and adapted model with its tokenizer, unless that is loaded already."""
    if tokenizer is None:
        tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    quantization = hooks.maybe(h.ftcore_quantization_config, plan=plan)
    model: torch.nn.Module = hooks.first(h.ftcore_load_model, plan=plan, quantization=quantization)
    stop_at_turn_ends(plan.family, model, tokenizer)
    base = hooks.first(h.ftcore_patch_model, plan=plan, model=model, phase=Phase.BASE)
    model = hooks.first(h.ftcore_quantize_model, plan=plan, model=model)
    model = hooks.first(h.ftcore_adapt_model, plan=plan, model=model)
    fused = hooks.first(h.ftcore_patch_model, plan=plan, model=model, phase=Phase.ADAPTED)
    patches = PatchReport(claims=base.claims + fused.claims, skipped=base.skipped + fused.skipped)
    memory.apply(plan, model)
    return Loaded(plan=plan, model=model, tokenizer=tokenizer, patches=patches)


def run(config: RunConfig, plugins: Sequence[object] = ()) -> RunResult:
    """Train, evaluate and export, as the config says.

    Raises Refused before any weight is read when something is wrong; and what an exporter raises, once the results and
    all other exports are written.
    """
    from ftcore.answers import Answers
    from ftcore.record import RunFolder, Stopwatch, claimed
    from ftcore.too_large import refuse_too_large

    watch = Stopwatch()
    hooks, plan = prepare(config, plugins)
    if plan.trainer is None:
        raise Refused(
            Problem("trainer", "no trainer is selected", "add +trainer=NAME; `ftcore plugins trainer` lists them")
        )
    if plan.run.prompts:
        refuse_without_generator(hooks)
    continues, plan = plan.trainer.continues, claimed(plan)
    with RunFolder(plan) as folder:
        # The rows come first: what is wrong with one for this tokenizer is said before any weight is read.
        tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
        raw = splits.read(hooks, plan)
        dataset = splits.formatted(hooks, plan, raw, tokenizer)
        collator = make_collator(hooks, plan, tokenizer)
        watch.lap("data")

        refuse_too_large(hooks, plan)
        loaded = load(hooks, plan, tokenizer)
        model, tokenizer = loaded.model, loaded.tokenizer
        folder.show_patches(loaded.patches)
        watch.lap("load")

        generator = hooks.maybe(h.ftcore_make_generator, plan=plan, model=model, tokenizer=tokenizer)
        prompts = plan.run.prompts or _sample_prompts(plan, generator)
        answers = Answers(generator, model, tokenizer, plan.run.sampling)
        before = answers.to(prompts, continues)
        if generator is not None:
            generator.weights_changed()  # training may go on from a checkpoint
        watch.lap("answers_before")

        rewards = make_rewards(hooks, plan)
        callbacks = [*counted(rewards), *hooks.collect(h.ftcore_callbacks, plan=plan)]
        optimizer = hooks.maybe(h.ftcore_make_optimizer, plan=plan, model=model)
        trainer = hooks.first(
            h.ftcore_make_trainer,
            plan=plan,
            model=model,
            tokenizer=tokenizer,
            dataset=dataset,
            collator=collator,
            rewards=rewards,
            callbacks=callbacks,
            generator=generator,
            optimizer=optimizer,
        )
        trained = hooks.first(h.ftcore_train, plan=plan, trainer=trainer)
        watch.lap("train")
        metrics = {**trained.metrics, **hooks.first(h.ftcore_evaluate, plan=plan, trainer=trainer)}
        watch.lap("evaluate")
        if generator is not None:
            generator.weights_changed()
        after = answers.to(prompts, continues)
        watch.lap("answers_after")

        folder.save_trained(loaded, trainer)
        written = exports(hooks, _checkpoint(loaded))
        watch.lap("export")
        result = RunResult(
            output_dir=plan.output_dir,
            metrics=metrics,
            artifacts=written.artifacts,
            patches=loaded.patches,
            timings=watch.laps,
            answers=[Answer(prompt=p, before=b, after=a) for p, b, a in zip(prompts, before, after, strict=True)],
        )
        folder.finish(result, trained)
        written.raise_failed(plan.output_dir)
    return result


def make_collator(hooks: Hooks, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> Any | None:
    """The data collator, None for the trainer library's own.

    Raises Refused for one that nobody would use.
    """
    collator = hooks.maybe(h.ftcore_make_collator, plan=plan, tokenizer=tokenizer)
    if collator is not None and not hooks.taken(h.ftcore_make_trainer, "collator"):
        name = plan.run.trainer.name if plan.run.trainer else "the trainer"
        fix = "leave ftcore_make_collator out, or override ftcore_make_trainer"
        raise Refused(Problem("plugins", f"{name} makes its own collator and takes none", fix))
    return collator


def make_rewards(hooks: Hooks, plan: Plan) -> list[Guarded]:
    """The reward functions; where the trainer asks none, that is said."""
    rewards = guarded(hooks.collect(h.ftcore_rewards, plan=plan), plan.run.scoring)
    if rewards and not hooks.taken(h.ftcore_make_trainer, "rewards"):
        name = plan.run.trainer.name if plan.run.trainer else "the trainer"
        note(f"{name} asks no rewards: {', '.join(r.__name__ for r in rewards)} of ftcore_rewards changes nothing")
    return rewards


def export(hooks: Hooks, loaded: Loaded) -> list[Artifact]:
    """Run the selected exporters on a model. Raises what one of them does, once the others have written."""
    written = exports(hooks, _checkpoint(loaded))
    written.raise_failed()
    return list(written.artifacts)


def export_stored(hooks: Hooks, plan: Plan) -> list[Artifact]:
    """Run the selected exporters on what a run left on disk. Raises what one of them does, once the others have
    written."""
    written = stored_exports(hooks, plan)
    written.raise_failed()
    return list(written.artifacts)


def stored_exports(hooks: Hooks, plan: Plan) -> Exports:
    """The same, with what failed beside what was written; the model is loaded only for exporters that need it."""
    tokenizer = hooks.first(h.ftcore_load_tokenizer, plan=plan)
    load_model = functools.partial(_loaded_model, hooks, plan, tokenizer)
    return exports(hooks, Checkpoint(load=load_model, tokenizer=tokenizer, plan=plan))


def _checkpoint(loaded: Loaded) -> Checkpoint:
    return Checkpoint(model=loaded.model, tokenizer=loaded.tokenizer, plan=loaded.plan)


def _loaded_model(hooks: Hooks, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> torch.nn.Module:
    return load(hooks, plan, tokenizer).model


def _hooks(config: RunConfig, plugins: Sequence[object]) -> Hooks:
    hooks = Hooks.for_run(config, installed(), plugins)
    hooks.add_core(PlanMaker(hooks), "core/plan")
    return hooks


def refuse_without_generator(hooks: Hooks) -> None:
    """Raises Refused where nobody in a run writes text."""
    from ftcore.answers import NO_GENERATOR

    if all(name.startswith("~") for name in hooks.who_answers(h.ftcore_make_generator)):
        raise Refused(NO_GENERATOR)


def _sample_prompts(plan: Plan, generator: object | None) -> list[str]:
    """What the sample rows' model is asked, where somebody can answer."""
    on_sample = plan.run.data is not None and plan.run.data.path is None
    return list(plan.format.sample_prompts) if generator is not None and on_sample and plan.format else []


def _rewarded(hooks: Hooks) -> bool:
    # A wrapper alone gives no reward.
    return any(not name.startswith(("core/", "~")) for name in hooks.who_answers(h.ftcore_rewards))


def _sample_reward(config: RunConfig, hooks: Hooks) -> str | None:
    """The reward that a trainer, or the rows' format, names for shipped rows, where the user named none."""
    if config.trainer is None or config.rewards or config.reward or (config.data and config.data.path):
        return None
    if _rewarded(hooks):
        return None
    own: str | None = getattr(installed().find("trainer", config.trainer.name).load(), "SAMPLE_REWARD", None)
    form = installed().find("data", config.data.name).load() if config.data and own else None
    return getattr(form, "SAMPLE_REWARD", own)


def _no_reward(plan: Plan, hooks: Hooks) -> list[Problem]:
    if not (plan.trainer and plan.trainer.wants_rewards) or _rewarded(hooks) or plan.run.rewards:
        return []
    name = plan.run.trainer.name if plan.run.trainer else ""
    names = ", ".join(installed().names("reward"))
    fix = f"add '+reward=[NAME]' with one of {names}; or rewards=[my_rewards.py:my_function]"
    return [Problem("reward", f"{name} needs a reward", fix)]
