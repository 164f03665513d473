"""The commands of `hadacore`, one file each; `cli` puts them together."""
