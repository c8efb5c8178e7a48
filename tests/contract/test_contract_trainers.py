"""The contract of every trainer."""

from ftcore.testing import TrainerContract, runs

pytest_plugins = ["ftcore.testing"]


class TestSFT(TrainerContract):
    plugin = "trainer/sft"


class TestGRPO(TrainerContract):
    plugin = "trainer/grpo"
    settings = ("trainer.max_completion_length=8", "trainer.num_generations=2")
    falls = False


class TestClassify(TrainerContract):
    plugin = "trainer/classify"
    base = ("+model=modernbert", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    # All the rows a step, so that steps can be compared.
    settings = ("trainer.global_batch=8", "trainer.learning_rate=1e-4")


class TestEmbed(TrainerContract):
    plugin = "trainer/embed"
    base = ("+model=bert", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    settings = ("trainer.global_batch=6", "trainer.learning_rate=0.01")  # all the rows


class TestSpeech(TrainerContract):
    plugin = "trainer/speech"
    base = ("+model=whisper", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    settings = ("data.eval_size=1",)
