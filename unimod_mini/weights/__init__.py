"""Folders of published weights, in and out."""
