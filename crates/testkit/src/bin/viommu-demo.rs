//! The guest's NVMe I/O from end to end, for `scripts/demo`: `viommu-demo KERNEL`. Its files are in `target/demo/`.

use std::fs;
use std::process::ExitCode;
use std::time::Duration;

use viommu_testkit::guest::{Folder, Guest, root};

const WORKLOAD: &str = "nvme-io --op verify --bs 128k --depth 8 --total 64M --scatter";

fn main() -> ExitCode {
    let Some(kernel) = std::env::args().nth(1) else {
        eprintln!("viommu-demo: name a kernel; scripts/demo does");
        return ExitCode::FAILURE;
    };
    let topology = match fs::read_to_string(root().join("qemu-configs/nvme.toml")) {
        Ok(topology) => topology,
        Err(error) => {
            eprintln!("viommu-demo: Cannot read qemu-configs/nvme.toml: {error}");
            return ExitCode::FAILURE;
        }
    };
    let guest = Guest::new(&topology, WORKLOAD).folder(&Folder::kept("target/demo")).kernel(&kernel);
    let outcome = guest.accel("auto").limit(Duration::from_secs(300)).start().end();
    print!("{}", outcome.log);
    if outcome.status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
