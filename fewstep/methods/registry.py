"""The table of methods. A new one is a line here, or an entry point in the group `fewstep.methods`."""

from __future__ import annotations

from ..registry import Registry

METHODS = Registry(
    "method",
    "fewstep.methods",
    {
        "flow_matching": "fewstep.methods.diffusion.flow_matching:FlowMatching",
        "decoupled_dmd": "fewstep.methods.diffusion.decoupled_dmd:DecoupledDMD",
        "dmd2": "fewstep.methods.diffusion.dmd2:DMD2",
        "sid": "fewstep.methods.diffusion.sid:SiD",
        "lcm": "fewstep.methods.diffusion.lcm:LCM",
        "consistency": "fewstep.methods.diffusion.consistency:Consistency",
        "pcm": "fewstep.methods.diffusion.pcm:PCM",
        "scott": "fewstep.methods.diffusion.scott:SCott",
        "rg_lcd": "fewstep.methods.diffusion.rg_lcd:RGLCD",
        "freeflow": "fewstep.methods.diffusion.freeflow:FreeFlow",
        "twinflow": "fewstep.methods.diffusion.twinflow:TwinFlow",
        "self_e": "fewstep.methods.diffusion.self_e:SelfE",
        "meanflow": "fewstep.methods.diffusion.meanflow:MeanFlow",
        "scm": "fewstep.methods.diffusion.scm:SCM",
        "shortcut": "fewstep.methods.diffusion.shortcut:Shortcut",
        "protein_flow_matching": "fewstep.methods.protein.flow_matching:ProteinFlowMatching",
        "sid_protein": "fewstep.methods.protein.sid_protein:SiDProtein",
        "classify": "fewstep.methods.vision.classify:Classify",
        "ferkd": "fewstep.methods.vision.ferkd:FerKD",
        "masked_lm": "fewstep.methods.language.masked_lm:MaskedLM",
        "text_classify": "fewstep.methods.language.text_classify:TextClassify",
        "ernie_tiny": "fewstep.methods.language.ernie_tiny:ErnieTiny",
    },
)
