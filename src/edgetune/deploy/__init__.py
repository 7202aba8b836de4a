"""Handing an artifact over: one file that carries it, its bill of materials and its hashes, and the way back.

Part of the runtime install: never imports torch, transformers or peft.
"""
