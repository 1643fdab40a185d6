"""`hf:NAME`, `hf:NAME?revision=COMMIT`: a model of the Hugging Face hub, as the folder of its files in the hub's cache.

Of what lies there config.json, the weights as safetensors and the tokenizer's files are fetched, nothing else. Where
the hub cannot be reached (or HF_HUB_OFFLINE=1), what its cache has is taken.
"""

import importlib.util
import pathlib

from zoo.data import hub
from zoo.errors import UsageError
from zoo.interop.files import INDEX, PICKLES, listed
from zoo.interop.tokenizer import CARRIED
from zoo.settings import shown

FETCHED = ("config.json", "*.safetensors", INDEX, *CARRIED)


def folder_of(spec: str) -> tuple[pathlib.Path, str]:
    """The folder that a spec means, and what is said of where it is from: its last name, or the hub's name and commit.

    Raises:
      UsageError: a spec of another form, no such model, none without a pickle, or the hub cannot be reached.
    """
    if not spec.startswith(hub.PREFIX):
        return pathlib.Path(spec), pathlib.Path(spec).absolute().name
    name, given = hub.parse(spec, "import", ("revision",), "hf:state-spaces/mamba-130m-hf")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise UsageError(f"import: {shown(spec)} needs the package huggingface_hub: pip install 'sequence-zoo[hf]'")
    import huggingface_hub

    revision = given.get("revision", "main")
    with hub.errors(name):
        try:
            found = pathlib.Path(
                huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(FETCHED))
            )
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            raise UsageError(
                f"{hub.PREFIX}{name}: the hub cannot be reached, and its cache has no {revision} of it; where there is "
                f"a network, `hf download {name}` fetches it"
            ) from error
        if not any(found.glob("*.safetensors")):
            there = huggingface_hub.HfApi().model_info(name, revision=revision).siblings or []
            pickled = [file.rfilename for file in there if file.rfilename.endswith(PICKLES)]
            raise UsageError(
                f"{hub.PREFIX}{name}: no safetensors there"
                + (
                    f", its weights are pickled ({listed(pickled)}): a revision may have them converted"
                    if pickled
                    else ""
                )
            )
    return found, f"{hub.PREFIX}{name}?revision={found.name}"
