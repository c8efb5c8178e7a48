"""The contract of every trainer."""

from ftcore.testing import TrainerContract, runs

pytest_plugins = ["ftcore.testing"]


class TestSFT(TrainerContract):
    plugin = "trainer/sft"


class TestCPT(TrainerContract):
    plugin = "trainer/cpt"


class TestGRPO(TrainerContract):
    plugin = "trainer/grpo"
    settings = ("trainer.max_completion_length=8", "trainer.num_generations=2")
    falls = False


class TestPPO(TrainerContract):
    plugin = "trainer/ppo"
    settings = ("trainer.max_completion_length=8", "trainer.num_mini_batches=2")
    falls = False


class TestRLOO(TrainerContract):
    plugin = "trainer/rloo"
    settings = ("trainer.max_completion_length=8", "trainer.num_generations=2")
    falls = False


class TestOnlineDPO(TrainerContract):
    plugin = "trainer/online_dpo"
    settings = ("trainer.max_completion_length=8",)
    falls = False


class TestGKD(TrainerContract):
    plugin = "trainer/gkd"
    # Rows alone, so that steps can be compared.
    settings = ("trainer.max_completion_length=8", "trainer.lmbda=0", "trainer.learning_rate=0.01")


class TestClassify(TrainerContract):
    plugin = "trainer/classify"
    base = ("+model=modernbert", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    # All the rows a step, so that steps can be compared.
    settings = ("trainer.global_batch=8", "trainer.learning_rate=1e-4")


class TestEmbed(TrainerContract):
    plugin = "trainer/embed"
    base = ("+model=bert", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    settings = ("trainer.global_batch=6", "trainer.learning_rate=0.01")  # all the rows


class TestTTS(TrainerContract):
    plugin = "trainer/tts"
    base = ("+model=csm", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    settings = ("trainer.learning_rate=1e-3",)


class TestSpeech(TrainerContract):
    plugin = "trainer/speech"
    base = ("+model=whisper", "model.tiny=true", "model.dtype=float32", *runs.SHORT)
    settings = ("data.eval_size=1",)


class TestDPO(TrainerContract):
    plugin = "trainer/dpo"
    # All the rows a step, so that steps can be compared.
    settings = ("trainer.global_batch=8",)


class TestKTO(TrainerContract):
    plugin = "trainer/kto"
    settings = ("trainer.global_batch=12", "trainer.micro_batch=6", "trainer.learning_rate=1e-3")


class TestORPO(TrainerContract):
    plugin = "trainer/orpo"
    settings = ("trainer.global_batch=8",)


class TestSimPO(TrainerContract):
    plugin = "trainer/simpo"
    settings = ("trainer.global_batch=8", "trainer.learning_rate=1e-3")


class TestReward(TrainerContract):
    plugin = "trainer/reward"
    settings = ("trainer.global_batch=8",)
