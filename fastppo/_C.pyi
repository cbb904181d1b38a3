from typing import TypedDict

class BuildFacts(TypedDict):
    torch: str
    compiler: str
    instruction_sets: list[str]
    cuda: str
    cuda_archs: list[str]

def build_facts() -> BuildFacts: ...
def cpu_capability() -> str: ...
