//! The results that a guest reports of its workloads: each line is a JSON object with the member `event`.

use std::ops::Deref;

use serde_json::Value;

use super::{Folder, RESULTS};

/// All results so far, in their order.
pub struct Results(Vec<Value>);

impl Results {
    /// Reads the results of the guest in this folder.
    pub fn read(folder: &Folder) -> Results {
        Results(folder.lines(RESULTS))
    }

    /// The results of a workload.
    pub fn of<'r>(&'r self, workload: &'r str) -> impl Iterator<Item = &'r Value> {
        self.events("result").filter(move |result| result["workload"] == workload)
    }

    /// The lines of a kind.
    pub fn events<'r>(&'r self, event: &'r str) -> impl Iterator<Item = &'r Value> {
        self.iter().filter(move |line| line["event"] == event)
    }

    /// The guest's report of its first boot.
    pub fn boot(&self) -> &Value {
        self.events("boot").next().expect("a report of the boot")
    }

    /// The function that it found at an address such as `0000:00:04.0`.
    pub fn function(&self, bdf: &str) -> &Value {
        let functions = self.boot()["pci"].as_array().unwrap();
        functions.iter().find(|function| function["bdf"] == bdf).expect("the function")
    }

    /// Whether the guest reached its last line, and no workload failed.
    pub fn ended_well(&self) -> bool {
        self.events("end").any(|end| end["ok"] == true)
    }

    /// Checks that the kernel has not complained.
    pub fn assert_no_complaint(&self) {
        assert!(self.events("kernel-log").next().is_some(), "no report of the kernel's log");
        for log in self.events("kernel-log") {
            assert_eq!(log["complaints"], serde_json::json!([]));
        }
    }
}

impl Deref for Results {
    type Target = [Value];

    fn deref(&self) -> &[Value] {
        &self.0
    }
}
