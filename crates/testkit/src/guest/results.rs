//! What a guest says of its workloads: a JSON object a line, each with the member `event`.

use std::ops::Deref;

use serde_json::Value;

use super::{Folder, RESULTS};

/// All that was said so far, in its order.
pub struct Results(Vec<Value>);

impl Results {
    /// Of the guest in this folder.
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

    /// What the guest was when it came up first.
    pub fn boot(&self) -> &Value {
        self.events("boot").next().expect("a report of the boot")
    }

    /// What it found at an address such as `0000:00:04.0` then.
    pub fn function(&self, bdf: &str) -> &Value {
        let functions = self.boot()["pci"].as_array().unwrap();
        functions.iter().find(|function| function["bdf"] == bdf).expect("the function")
    }

    /// Whether the guest reached its last line, and no workload failed.
    pub fn ended_well(&self) -> bool {
        self.events("end").any(|end| end["ok"] == true)
    }

    /// The kernel has found nothing wrong with itself.
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
