"""Train in one process and in several of this machine, and record what came of it: FOLDER is the argument.

Ranks are forks of one process, so that its imports, which take most of the time, happen once.
"""

import gc
import importlib.util
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

import cmcr_hf
from cmcr_hf.modeling import losses_cmcr
from cmcr_hf.training import train

spec = importlib.util.spec_from_file_location("test_train", Path(__file__).with_name("test_train.py"))
test_train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test_train)

RUNS = {
    "one": (1, 16, 1),
    "two": (2, 8, 1),
    "one-accumulating": (1, 16, 2),
    "two-accumulating": (2, 8, 2),
    "one-ex-mcr": (1, 16, 1, "ex-mcr"),
    "two-ex-mcr": (2, 8, 1, "ex-mcr"),
}


def train_connector(folder, batch_size, accumulation, objective="c-mcr"):
    """Train for three steps; return the gradients of each, the weights behind the last and Trainer's log."""
    gradients = []

    class Recorder(train.NoiseCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            weights = model.named_parameters()
            gradients.append({name: weight.grad.clone() for name, weight in weights if weight.grad is not None})

    train.NoiseCallback = Recorder
    args = test_train.arguments(
        folder,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        # Steps of AdamW are no larger for large gradients: it would blow up the last digits of those that are zero.
        optim="sgd",
        learning_rate=0.1,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="no",
    )
    # The rows are no multiple of the batch.
    embeds = test_train.aligned_embeds(70)
    config, data = test_train.small_config(noise_norm=0.3), embeds
    if objective == "ex-mcr":
        projectors = {"clip": {"input_dim": 6}, "clap": {"input_dim": 4}}
        config = cmcr_hf.CMCRConfig(projectors=projectors, objective=objective, noise_norm=0.3)
        data = [{name: rows[part] for name, rows in embeds.items()} for part in (slice(0, 30), slice(30, 70))]
    connector, history = train.train_connector(
        config,
        data,
        args,
        validation_rows=16,
        log_lines=False,
    )
    kinds = [type(layer).__name__ for layer in connector.projectors["clap"].layers]
    assert args.world_size == int(os.environ["WORLD_SIZE"])
    return {"gradients": gradients, "weights": connector.state_dict(), "history": history, "layers": kinds}


def loss_of_ranks():
    """Return the mean loss and the gradients of unequal blocks of rows, those of the rank."""
    losses_cmcr.CPU_BLOCK_ROWS = 3
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    group = None
    if ranks > 1:
        dist.init_process_group("gloo")
        group = dist.group.WORLD
    rows = F.normalize(torch.randn(2, 14, 5, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    own = slice(rank * 14 // ranks, (rank + 1) * 14 // ranks)
    a, b = (side[own].clone().requires_grad_() for side in rows)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    loss = losses_cmcr.symmetric_info_nce(a, b, scale, group)
    loss.backward()
    return {"loss": loss.detach(), "a": a.grad, "b": b.grad, "scale": scale.grad}


def in_ranks(folder, ranks, run, *given):
    """Call `run` in forks of this process and save what it returns in each: `FOLDER/RANK.pt`."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(ranks))
            torch.save(run(*given), folder / f"{rank}.pt")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit(f"a rank of {folder.name} failed")


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Trainer collects garbage: a fork would copy, page by page, what all those imports made.
    gc.collect()
    gc.freeze()
    root = Path(sys.argv[1])
    for ranks in (1, 2):
        in_ranks(root / f"loss-{ranks}", ranks, loss_of_ranks)
    for name, (ranks, *given) in RUNS.items():
        in_ranks(root / name, ranks, train_connector, root / name, *given)
