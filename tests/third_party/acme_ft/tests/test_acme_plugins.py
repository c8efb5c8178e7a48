import json
import zipfile
from pathlib import Path

from acme_ft.json_reward import score
from transformers import AutoModelForCausalLM

import ftcore
from ftcore.testing import ExportContract, ModelContract, RewardContract, TrainerContract

pytest_plugins = ["ftcore.testing"]
SGD = ("trainer.optimizer=sgd", "trainer.learning_rate=1e-3", "trainer.max_grad_norm=0", "trainer.schedule=constant")


class TestOlmo2(ModelContract):
    plugin = "model/acme_olmo2"

    def test_no_kernel_is_put_on_maths_that_it_does_not_know(self):
        from ftcore.testing import runs

        patches = runs.loaded([*self.tiny(), "kernels=[reference]"]).patches
        assert {claim.role for claim in patches.claims} == {"mlp", "rms_norm"}
        assert {skip.role for skip in patches.skipped} == {"attention"}


class TestZip(ExportContract):
    plugin = "export/acme_zip"
    base = ("+model=acme_olmo2", "model.tiny=true", "model.dtype=float32")
    tolerance = 2e-3  # the merged model has 16 bits

    def reload(self, artifact, loaded):
        folder = artifact.path.with_suffix("")
        with zipfile.ZipFile(artifact.path) as archive:
            archive.extractall(folder)
        assert set(json.loads((folder / "MANIFEST.json").read_text())) == {f.name for f in Path(folder).iterdir()} - {
            "MANIFEST.json"
        }
        return AutoModelForCausalLM.from_pretrained(folder)


class TestAnchored(TrainerContract):
    plugin = "trainer/acme_anchored"

    def test_a_strong_pull_keeps_the_adapter_near_its_start(self, tmp_path):
        from ftcore.testing.trainer import Watched

        moved = {}
        for pull in (0, 1000):
            seen, folder = Watched(), tmp_path / str(pull)
            steps = [f"trainer.pull={pull}", "trainer.max_steps=4", f"output_dir='{folder}'"]
            ftcore.run([*self.base, *self.selected(), *SGD, *steps], plugins=[seen])
            weights = seen.trainer.model.named_parameters()
            moved[pull] = sum(float((p - seen.before[name]).square().sum()) for name, p in weights)
        assert 0 < moved[1000] < moved[0]


class TestJson(RewardContract):
    plugin = "reward/acme_json"


def test_scores():
    assert score('{"answer": 12}', ["answer"]) == 1
    assert score('{"answer": 12}', ["question"]) == 0.5
    assert score("12", []) == 0.5
    assert score("twelve", []) == 0
