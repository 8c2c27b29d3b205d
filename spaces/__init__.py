"""Gradio Spaces."""
