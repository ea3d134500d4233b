"""Engines over networks: namespaces with limited links, software EFA devices."""
