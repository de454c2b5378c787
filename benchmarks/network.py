"""Flows a second: NetMamba against itself on the reference operators, and the way from a capture to bytes.

    uv run python benchmarks/network.py --threads 1

The reference operators are the definition of each operator in torch and torch's own modules. Both networks hold the
same weights, their logits are compared before anything is timed, and timings of the two alternate; the figure is the
ratio of the shortest times. ``capture``: reading, splitting and cutting a generated capture as a part of the time that
the network takes for its flows.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from timing import shortest

import zoo
import zoo_kernels
from zoo_network.captures import read_capture, write_pcap
from zoo_network.flows import FlowBytes, split_flows, to_tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "plugins" / "network" / "recipes"))
import traffic


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flows", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    r, representation = np.random.default_rng(0), FlowBytes()
    with tempfile.TemporaryDirectory() as folder:
        path = write_pcap(Path(folder) / "a.pcap", traffic.capture(r, list(traffic.PROTOCOLS) * 8))

        def prepare() -> np.ndarray:
            return np.stack([representation(flow.kept) for flow in split_flows(read_capture(path).packets)])

        flows = prepare()
        reading = shortest({"capture": prepare}, arguments.repeat)["capture"] / len(flows)
    print(f"{len(flows)} flows in the capture; {arguments.flows} at a time, {arguments.threads} threads, float32")
    for name in ("netmamba_classifier", "netmamba_micro.generated"):
        model = (zoo.load if "." in name else zoo.create)(name).float().eval()
        x = to_tensor(flows[: arguments.flows])

        def reference(model=model, x=x) -> torch.Tensor:
            with zoo_kernels.backend("reference"):
                return model(x)

        torch.testing.assert_close(model(x), reference(), rtol=1e-3, atol=1e-4)
        times = shortest({"zoo": lambda m=model, x=x: m(x), "reference": reference}, arguments.repeat)
        a_flow = times["zoo"] / len(x)
        print(
            f"{name:26} {1 / a_flow:6.0f} flows a second, {times['reference'] / times['zoo']:.1f} times the reference; "
            f"capture to bytes: {reading / a_flow:.3f} of the network's time"
        )


if __name__ == "__main__":
    main()
