"""The commands of `inrun`, one file each."""
