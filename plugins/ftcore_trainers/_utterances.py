"""Words and recordings as rows of text tokens and frames of codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftcore import Plan, Problem, Refused
from ftcore.audio import read
from ftcore.control import Encoder
from ftcore.errors import Exit
from ftcore_trainers._local_rows import converted
from ftcore_trainers._recordings import unfit

if TYPE_CHECKING:
    import torch

IGNORED = -100
RATE = 24_000
"""Samples a second of Mimi's recordings."""
FRAMES_A_SECOND = 12.5
NUMBERS = "number the speakers: 0, 1, ..."


def wrong_speaker(plan: Plan) -> Iterator[Problem]:
    """The first speaker of the local rows who is no number."""
    for place, row in converted(plan):
        if not _speaker(row).isdecimal():
            yield Problem(place, f"the speaker '{_speaker(row)}' is no number", NUMBERS, Exit.DATA)
            return


def _speaker(row: dict[str, Any]) -> str:
    return str(row.get("speaker") or 0)


@dataclass(frozen=True)
class Utterances:
    """Collates words and recordings as CSM reads them: `[speaker]words`, the end of text, frames, the end of speech."""

    words: Encoder
    """Reads look-alikes of control tokens as the words that they are."""
    codec: Any
    """Makes codes of samples; in evaluation mode, and not trained."""
    config: Any
    """The model's."""
    max_length: int
    """Longest row in tokens and frames."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, max_length: int) -> Utterances:
        """The collator of a CsmForConditionalGeneration."""
        return cls(Encoder(tokenizer), model.codec_model, model.config, max_length)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels` `[rows, longest]`, and `codes` `[rows, longest, codebooks]`, all int64.

        A place with codes is a frame, whose label is its first code; the others are text, with -100 for both. Rows are
        padded on the right, so that no attention mask is needed: no query sees a later key, and pads have no labels.

        :raises Refused: for a row that does not fit the model.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pairs = [self.row(row) for row in rows]
        codes = pad_sequence([codes for _, codes in pairs], True, IGNORED)
        ids = pad_sequence([torch.tensor(ids) for ids, _ in pairs], True, self._end)
        return {"input_ids": ids, "labels": codes[..., 0].contiguous(), "codes": codes}

    def row(self, row: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
        """Token ids, and the codes of each place, `[length, codebooks]`, -100 where there is text."""
        import torch

        begin, speaker = self.words.tokenizer.bos_token_id, _speaker(row)
        if not speaker.isdecimal():
            raise Refused(Problem("data", f"the speaker '{speaker}' is no number", NUMBERS, Exit.DATA))
        words, _ = self.words.encode(self.words.marked(f"[{speaker}]{row['text']}"))
        codes = self._codes(row["audio"])
        text = [*([] if begin is None else [begin]), *words, self._end]
        ids = [*text, *[self.config.audio_token_id] * len(codes), self.config.audio_eos_token_id]
        if len(ids) > self.max_length:
            message = (
                f"{len(ids)} tokens and frames, more than trainer.max_length={self.max_length}: {row['text'][:40]}"
            )
            raise Refused(Problem("data", message, "cut the recording, and its words with it", Exit.DATA))
        end = torch.full((1, codes.shape[1]), self.config.codebook_eos_token_id)
        return ids, torch.cat([torch.full((len(text), codes.shape[1]), IGNORED), codes, end])

    @property
    def _end(self) -> int:
        token: int = self.words.tokenizer.eos_token_id  # type: ignore[assignment]
        return token

    def _codes(self, audio: Any) -> torch.Tensor:
        """The codes of a recording, `[frames, codebooks]`, computed in the codec's own dtype, outside autocast."""
        import torch

        samples, rate = read(audio)
        if problem := unfit("data", rate, len(samples) / rate, RATE, lambda seconds: None):
            raise Refused(problem)
        place = next(self.codec.parameters())
        with torch.no_grad():
            wave = torch.from_numpy(samples)[None, None].to(place.device, place.dtype)
            codes: torch.Tensor = self.codec.encode(wave, num_quantizers=self.config.num_codebooks).audio_codes
        return codes[0].T.cpu()
