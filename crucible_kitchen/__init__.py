"""Crucible Kitchen: post-training orchestration."""
