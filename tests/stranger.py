"""What turns a process of its own into that of a stranger, who has the dependencies and not the package."""

WITHOUT_THE_PACKAGE = """
import importlib.abc, sys

class WithoutThePackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "cmcr_hf":
            raise ImportError("the package is not installed")

sys.meta_path.insert(0, WithoutThePackage())
"""
