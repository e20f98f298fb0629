//! Named points of a transaction at which a test may end it. In operation there are none: nothing looks at them unless the
//! environment names one when the process starts, or the node was given a hook.

use std::fmt;
use std::sync::{Arc, OnceLock};

/// The environment's variable that names the step at which the process ends itself.
const VARIABLE: &str = "SHKV_TEST_CRASH_AT";

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A point of a transaction.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Step { $($(#[$doc])* $name,)* }

        impl Step {
            /// All of them, in the order of a transaction.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name in the environment.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

steps! {
    /// At the coordinator, before anything is sent.
    BeforePrepare = "before-prepare",
    /// At a participant, before the prepare is in its log.
    PrepareCame = "prepare-came",
    /// At a participant, when the prepare is applied and before it is answered.
    PrepareDone = "prepare-done",
    /// At the coordinator, when all have prepared and before it decides.
    BeforeDecide = "before-decide",
    /// At the coordinator, when the decision is proposed and not yet known to be in its log.
    DecideProposed = "decide-proposed",
    /// At the coordinator, when the decision is applied and before anybody hears of it.
    AfterDecide = "after-decide",
    /// At a participant, when the finish is applied and before it is answered.
    FinishDone = "finish-done",
    /// At the coordinator, when all have finished and before the decision is let go.
    BeforeLetGo = "before-let-go",
    /// At the coordinator, when the decision is let go; the client was answered just before that.
    AfterLetGo = "after-let-go",
}

type Hook = Arc<dyn Fn(Step) -> bool + Send + Sync>;

/// What a test wants done at the points of transactions.
#[derive(Clone, Default)]
pub struct Steps {
    hook: Option<Hook>,
}

impl fmt::Debug for Steps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steps").field("hook", &self.hook.is_some()).finish()
    }
}

impl Steps {
    /// With a hook that says, at each step of the coordinator, whether the transaction goes no further in this process.
    #[must_use]
    pub fn with_hook(hook: impl Fn(Step) -> bool + Send + Sync + 'static) -> Self {
        Self { hook: Some(Arc::new(hook)) }
    }

    /// A step of the coordinator. It does not return if the transaction is to go no further.
    pub async fn reach(&self, step: Step) {
        #[cfg(feature = "sim")]
        if crate::inspect::reached(step.into()) {
            std::future::pending::<()>().await;
        }
        end_at(step);
        if self.hook.as_ref().is_some_and(|hook| hook(step)) {
            std::future::pending::<()>().await;
        }
    }
}

/// Ends the process, if the environment names this step.
pub fn crash_at(step: Step) {
    #[cfg(feature = "sim")]
    crate::inspect::reached(step.into());
    end_at(step);
}

fn end_at(step: Step) {
    static NAMED: OnceLock<Option<String>> = OnceLock::new();
    let named = NAMED.get_or_init(|| std::env::var(VARIABLE).ok());
    if named.as_deref() == Some(step.name()) {
        std::process::abort();
    }
}
