# SPDX-License-Identifier: AGPL-3.0-or-later
"""The vector drawings of the demo set: outlines, patterns, the catalogue of classes, stickers and backdrops."""
