"""How a command starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "raise SystemExit('torch was imported')\n"
TRANSFORMERS = """
import importlib.util
print("torch", importlib.util.find_spec("torch") and "found")
PreTrainedTokenizerFast = None
if importlib.util.find_spec("torch"):
    import torch
"""
LATER = """
import importlib.util, sys
from experiments import command
command.import_transformers()
print(importlib.util.find_spec("torch").origin)
sys.modules["torch"], sys.modules["transformers"] = sys, None
try:
    command.import_transformers()
except ImportError:
    print(sys.modules["torch"] is sys)
"""


def ran(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """A process that finds the modules of a folder before all that are installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_transformers_finds_no_torch_in_a_command(tmp_path):
    for name, text in (("torch", TORCH), ("transformers", TRANSFORMERS)):
        (tmp_path / f"{name}.py").write_text(text)
    command = ran(tmp_path, "-m", "scripts.generate", "--prompt", "a", "--model", str(tmp_path / "none"))
    assert (command.returncode, command.stdout) == (2, "torch None\n"), command.stderr
    later = ran(tmp_path, "-c", LATER)  # it is there again, and stays where it was imported before
    assert later.stdout.split("\n")[:3] == ["torch None", str(tmp_path / "torch.py"), "True"], later.stderr
