"""Continual learning on real data: experiments, each one command with several seeds."""
