# SDK stand-in (a test double) of the module `qaic`: Session with raw buffers out.
from pathlib import Path

import numpy as np
from standin_engine import Engine


def root():
    return Path(globals()["ROOT"])  # set by the file that runs this one


class Session:
    def __init__(self, model_path, dev_id=0, num_activations=1, set_size=1,
                 oversubscription_name=None):  # fmt: skip
        self.engine = Engine(Path(model_path), root())
        cards = {card["id"]: card for card in self.engine.state()["cards"]}
        if dev_id not in cards or cards[dev_id]["status"] != "Ready":
            raise RuntimeError(f"Failed to create session on QID {dev_id}")
        if num_activations != 1 or set_size != 1 or not oversubscription_name:
            raise ValueError("the stand-in takes one activation in a group")
        self.device, self.ready = dev_id, False

    def setup(self):
        self.ready = True

    # A method, as the documentation has it; rt.py and the tests cover the other reading.
    def model_input_shape_dict(self):
        return self._described("inputs")

    @property
    def model_output_shape_dict(self):
        return self._described("outputs")

    def _described(self, kind):
        return {
            name: (tuple(buffer["shape"]), np.dtype(buffer["dtype"]))
            for name, buffer in self.engine.meta[kind].items()
        }

    def run(self, inputs):
        if not self.ready:
            raise RuntimeError("setup() was not called")
        results = self.engine.run(inputs, self.device)
        return {name: array.tobytes() for name, array in results.items()}

    def reset(self):
        self.ready = False
