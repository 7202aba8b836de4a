"""One training with TRL, in a process and an environment of its own; `train_speed.py` starts it.

    python _train_speed_trl.py JOB.json

The job says `model` (a folder), `rows` (a file of `{"input_ids", "labels"}` rows), `out` (a folder that gets
`adapter/` and `steps.json`), `lora` (of LoraConfig) and `sft` (of SFTConfig; what it does not name stays TRL's default).
Nothing of edgetune is imported.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Train, and write the adapter and what each step took."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Seconds of each optimizer step, from the end of the one before: its batches, passes and update."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds: list[float] = []
            self.losses: list[float] = []
            self.cpu_seconds: list[float] = []
            self.last, self.last_cpu = time.monotonic(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now, cpu = time.monotonic(), time.process_time()
            self.seconds.append(now - self.last)
            self.cpu_seconds.append(cpu - self.last_cpu)
            self.last, self.last_cpu = now, cpu

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    out = Path(job["out"])
    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    clock = Clock()
    trainer = SFTTrainer(
        model=job["model"],
        args=SFTConfig(output_dir=str(out / "trainer"), **job["sft"]),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(**job["lora"]),
        callbacks=[clock],
    )
    trainer.train()
    trainer.model.save_pretrained(out / "adapter")
    result = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "losses": clock.losses,
        "tokens": trainer._total_train_tokens,
        "base_dtype": str(trainer.model.get_input_embeddings().weight.dtype),
        "adapter_dtypes": sorted({str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}),
        "threads": torch.get_num_threads(),
        "settings": trainer.args.to_dict(),  # what was in effect, defaults included
    }
    (out / "steps.json").write_text(json.dumps(result, indent=1, default=str), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
