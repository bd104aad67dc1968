//! One TOML file from which endpoints, the VIOT and QEMU's arguments are made.
