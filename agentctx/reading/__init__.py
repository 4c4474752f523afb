"""Texts that a model reads once and answers from: the runtime for people, above the loading of models."""
